"""Architecture x task family x method: what each cell must show, and the record of what it showed.

``python -m tests.conformance`` runs them all and goes on where it was stopped; see ``__main__``.
"""
