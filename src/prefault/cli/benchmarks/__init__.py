"""Options and the subcommand of ``prefault bench``."""
