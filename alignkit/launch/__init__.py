"""The launch room: where a stage runs, in which processes, and what a command does with its stages."""
