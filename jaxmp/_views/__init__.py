"""How results are shown: tables, pages, figures, and the methods of every result."""
