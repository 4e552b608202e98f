"""prefault bench: the measurement published with MADV_POPULATE_READ and MADV_POPULATE_WRITE, on any machine.

Modules, lowest first:

    grid, published, kinds     the cells; the published figures; the backings
    machine, results, jsonfile the machine that a figure belongs to; records, statistics; the file format
    stopping, places           Ctrl-C as a descriptor; the hugetlb pool and hugetlbfs, set up and restored
    obstacles                  reasons why a cell cannot run on this machine
    measure, worker            one cell, in this process; the process that runs cells
    worker_process, runner     the parent's side of the worker; the whole grid
    ratios, findings           comparison with the published figures; in words
    grid_report, live_display  the table; the display while the grid runs

prefault bench device (in ``routes``): routes to populated device memory, five on one device and those of devices that ship.

    device_driver              the device
    device_results, device_json  cells and records; the file format
    device_routes, device_runner one repetition of one route; all routes
    device_processes           processes of a device in /proc
    shipped_results            cells and records of devices that ship
    shipped_routes             a timed step and its check
    enclave_routes             one repetition on an enclave page cache
    buffer_driver, buffer_routes  one repetition on a buffer object
    shipped_runner             all of them
    device_report              the tables
"""
