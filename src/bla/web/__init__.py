"""HTTP servers whose connections are limited in time and number; knows nothing of ours."""
