"""Serverless workers run the same redshift model on their share of one dataset.

Public is what AWS Lambda calls, `lambda_worker.handlers`.
"""

__all__: list[str] = []
