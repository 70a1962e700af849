"""Tables of methods and data sets: the grid of runs, the cells that runs leave, and the pages made from cells."""

from bayestune.tables.cells import read_cells as read_cells
