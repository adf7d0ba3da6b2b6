"""A step's kernels in Triton.

A table has one row per unit: what one program works on. Each program writes what it sums to a place
of its own; another kernel adds the places of a matrix up in their order. Without atomics a step
gives the same bits every time, and copies on several ranks stay equal. (The only atomics add two
numbers to a zero: a row of which one rank has both parts.)
"""
