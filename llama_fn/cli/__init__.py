"""The command line. Each subcommand has a file, which parses options, calls the library and prints."""
