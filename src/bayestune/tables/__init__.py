"""Tables of methods and data sets: the grid of runs behind them, the cells these leave, the pages made from cells."""

from bayestune.tables.cells import cell_path as cell_path
from bayestune.tables.cells import cell_record as cell_record
from bayestune.tables.cells import read_cells as read_cells
