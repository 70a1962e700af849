"""`python -m bayestune`, for launchers such as `accelerate launch -m bayestune train ...`."""

from bayestune.cli.app import main

main()
