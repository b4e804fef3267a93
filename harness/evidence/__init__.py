"""What runs left, read and shown: records, tables, figures, claims, documents, the report."""
