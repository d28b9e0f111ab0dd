"""The level of all confidence intervals: 95%."""

#: Standard errors from the centre of a 95% confidence interval to its ends.
Z = 1.959963984540054
