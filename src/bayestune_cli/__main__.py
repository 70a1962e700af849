"""`python -m bayestune_cli`, the program without its launcher's script."""

from bayestune_cli.app import main

main()
