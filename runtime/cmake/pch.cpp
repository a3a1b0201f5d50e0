// Carries the precompiled header that every target with torch shares.
