"""What an experiment found, as one self-contained page: figures, galleries of images, and every number with its standard error.

`content` chooses what is shown, `figures` draws, `page` writes HTML, `publish` puts it into the store beside the scores. The colours
and the type are those of `memtail/figures/base.css`, which `memtail.figures.style` takes its colours from too.
"""
