"""Worker processes: launching them, the memory shared with them, the program they run, and watching over them."""
