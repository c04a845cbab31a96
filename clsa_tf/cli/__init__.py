"""The command line: flags, flagfiles, help, start and end of a command."""
