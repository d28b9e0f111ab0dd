"""Explorer of experiments in the browser: progress, and a training set with its images, to filter and sort.

`app.create(store)` makes the application, which `memtail explore` and the aggregator serve (`server`). It only reads the store. All that a
page shows is determined by its URL, and most of it is also available as CSV.
"""
