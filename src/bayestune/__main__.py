"""`python -m bayestune`, for launchers such as `accelerate launch -m bayestune train ...`."""

from bayestune_cli import main

main()
