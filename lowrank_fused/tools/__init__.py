"""What stands behind the command line: the machine, models by name, what methods cost, what the compiler makes."""
