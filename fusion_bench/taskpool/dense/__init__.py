"""Tasks with an answer for each pixel: classes, depths, directions."""
