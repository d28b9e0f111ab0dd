"""The web page: experiments and how far they are, and the training set to search, sort and look into, with the images.

`app.create(store)` makes the application, which is served by `memtail explore` and by the aggregator (`server`). It reads the store and
writes nothing there. All that a page shows follows from its address; what it shows can also be had as CSV, where each page says.
"""
