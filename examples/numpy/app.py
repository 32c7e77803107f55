"""Solves a system of linear equations: the import takes a second, which a frozen function has behind it."""

import numpy


def handler(event, context):
    matrix = numpy.array(event.get("matrix", [[2, 1], [1, 3]]), dtype=float)
    vector = numpy.array(event.get("vector", [3, 5]), dtype=float)
    solution = numpy.linalg.solve(matrix, vector)
    return {"solution": solution.tolist(), "numpy": numpy.__version__}
