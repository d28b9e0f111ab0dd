"""Report of an experiment as one self-contained HTML page: figures, galleries of images, and every number with its standard error.

`content` chooses what the page shows (`items` are its types), `figures` draws, `page` renders HTML, `publish` writes the page and its
figures to the store. Colours and type come from `memtail/figures/base.css`, which `memtail.figures.style` also reads.
"""
