"""Residency as pictures: a live heat map in the terminal, and a report in one HTML file.

import prefault
from prefault.pictures import report_page, row_of_area, write_report

rows = [row_of_area("weights", prefault.residency(weights)), row_of_area("device", area.residency())]
write_report("memory.html", report_page("Memory of the server", rows=rows))
"""

from prefault.pictures.heat_rows import HeatRow, row_of_area, row_of_file, row_of_mapping, rows_of_process, rows_of_tensors
from prefault.pictures.html_report import report_page, write_report

__all__ = [
    "HeatRow",
    "report_page",
    "row_of_area",
    "row_of_file",
    "row_of_mapping",
    "rows_of_process",
    "rows_of_tensors",
    "write_report",
]
