"""This machine and this process: capabilities, CPUs, cgroups, huge pages, files of /proc, fork hooks."""
