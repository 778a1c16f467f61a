"""`python -m lowrank_fused` is the command `lowrank-fused`."""

from lowrank_fused.cli import main

if __name__ == "__main__":
    main()
