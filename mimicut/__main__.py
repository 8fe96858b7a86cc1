"""python -m mimicut"""

from mimicut.cli.app import main

main()
