"""What a run will be, before anything starts: where it begins, on which device, as which script."""
