"""`python -m grpo_mega`: the same as `grpo-mega`, and what the launcher starts on each rank."""

from grpo_mega.cli import main

if __name__ == "__main__":  # saving a checkpoint spawns a process that imports this file again
    main()
