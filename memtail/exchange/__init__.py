"""Files of other tools: `export` writes what they read, and `import` makes experiments of trials that they trained."""
