"""What has to stay in float32."""
