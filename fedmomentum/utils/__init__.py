"""Small helpers without a domain: files, schemas, names, processes, seeds, modules."""
