from simsiam.cli import main

main()
