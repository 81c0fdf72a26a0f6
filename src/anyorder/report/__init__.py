"""Reports: figures, tables and the HTML page."""
