"""The servers of a cluster on one machine: PostgreSQL, S3, MLflow and two Ray nodes."""
