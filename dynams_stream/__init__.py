"""DynaMS stream: train on the part of a huge WebDataset that matters now."""
