"""Attribution of whole corpora: files of texts in, Parquet shards out, resumable at any moment."""
