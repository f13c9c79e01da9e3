"""What every other folder needs: errors, checks of arguments, random numbers, progress, files, versions, devices."""
