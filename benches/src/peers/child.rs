//! Child processes that do not outlive this one, whatever ends it: a server or a benchmark that is left behind takes the cores of the next measurement.

use std::process::Command;

/// Has the system end the program (SIGTERM) when this process ends without having done so itself, as when it is killed.
///
/// The signal comes with the end of the *thread* that starts the program: that must be one that lives as long as it is needed. Linux only; elsewhere
/// nothing is done.
pub fn ends_with_us(command: &mut Command) -> &mut Command {
    #[cfg(target_os = "linux")]
    {
        use std::io::{Error, ErrorKind};
        use std::os::unix::process::{CommandExt, parent_id};

        let signal = libc::c_ulong::from(libc::SIGTERM.unsigned_abs());
        let parent = std::process::id();
        // SAFETY: what runs between fork and exec makes two system calls, allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                    return Err(Error::last_os_error());
                }
                // Ended before it could be asked for.
                if parent_id() != parent {
                    return Err(ErrorKind::Interrupted.into());
                }
                Ok(())
            });
        }
    }
    command
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_program_ends_with_who_started_it() {
        let started = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            ends_with_us(command.arg("600")).spawn()
        });
        let mut program = started.join().unwrap().unwrap();
        assert_eq!(program.wait().unwrap().signal(), Some(15));
    }
}
