"""`python -m mpillm` is the same door as `mpillm`."""

from mpillm.cli import main

main()
