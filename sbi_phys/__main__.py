"""`python -m sbi_phys`: the command line."""

from sbi_phys.workflow.cli import main

if __name__ == "__main__":
    main()
