"""What an experiment found, as one self-contained page: figures, galleries of images, and every number with its standard error.

`content` chooses what is shown, `figures` draws, `page` writes HTML, `publish` puts it into the store beside the scores. `base.css` holds
the colours and the type that all of memtail's pages and figures share.
"""
