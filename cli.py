from moec.cli import main

main()
