"""python -m mimicut"""

from mimicut.cli.start import main

main()
