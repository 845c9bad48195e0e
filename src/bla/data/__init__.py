"""Images: photos, folders, tables, published data sets, Hugging Face data sets."""
