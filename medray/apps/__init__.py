"""What has a user of its own: nights, the service, the viewer, exports, checks."""
