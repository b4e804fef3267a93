"""What a run will take, by formula: FLOPs, memory, step time, and the layouts that fit."""
