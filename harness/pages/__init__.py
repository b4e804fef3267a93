"""Documents, figures, plots, diagrams and the report: what people read, generated from evidence."""
