"""Small domain-independent helpers: files, schemas, names, processes, seeds, modules."""
