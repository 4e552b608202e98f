"""prefault bench: the measurement published with MADV_POPULATE_READ and MADV_POPULATE_WRITE, on any machine.

Modules, lowest first:

    grid, published, kinds     what is measured, what was published, what the backings are
    machine, results, jsonfile what a figure travels with; records, statistics; the file format
    stopping, places           Ctrl-C as a descriptor; the hugetlb pool and hugetlbfs, set up and restored
    obstacles                  why a cell cannot run here
    measure, worker            one cell, in this process; the process that runs cells
    client, runner             the parent's side of it; the whole grid
    ratios, findings, report   beside the published figures; in words; as a table
    progress                   what is shown meanwhile

prefault bench device: five routes to populated device memory, on one device.

    device_driver              the device
    device_results, device_json  what is measured, records; the file format
    device_routes, device_runner one route, once; all of them
    device_report              as a table
"""
