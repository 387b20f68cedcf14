"""Measuring speed: attention against what else there is, and tile shapes of the GPU kernels.

Everything but the command itself runs with torch alone, so that it runs where the command line is not installed.
"""
