"""What this machine and this process can do and have: capabilities, CPUs, cgroups, huge pages, files of /proc."""
